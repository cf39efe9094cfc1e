"""The device side of a step: compiled programs, device state, sampling and the memory plan."""
