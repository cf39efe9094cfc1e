"""Everything that decides the speed on one GPU, measured by one command: ``python -m bench.gpu``.

__main__   the command line: runs the parts in order and keeps what they found
part       what a part is, and the list of them; imports nothing heavy
process    the parent's side of a part: a child process that ends at its budget
child      the child's side: yields numbers into a file as they are found
report     the JSON file, the tables, and two files beside each other
limits     what the device could do at best, from its data sheet
timing     seconds of a call
device, kernels, model, serving    the parts
traces     recorded traffic of real services, read and scaled
"""
