"""How the integers of a linear are multiplied: one class for each kernel, chosen by the device."""
