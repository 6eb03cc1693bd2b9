"""The quantizer modules, and how they are made from specs."""
