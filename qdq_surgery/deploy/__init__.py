"""From a calibrated model to files that runtimes run in INT8, and the proof that they do."""
