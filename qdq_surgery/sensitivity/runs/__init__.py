"""A model that is run hundreds of times with other quantizers each time: what need not be run again is not."""
