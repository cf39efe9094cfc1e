"""What speaks to the outside; knows protocols and text, decides nothing."""
