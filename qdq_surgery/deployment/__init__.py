"""The folder that a quantized file is deployed as, as runtimes and other tools load it."""
