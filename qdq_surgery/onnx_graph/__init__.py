"""What stands in an exported graph: Q/DQ pairs, products, and what a runtime made of them."""
