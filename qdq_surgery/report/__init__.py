"""Views of a conversion for people: graph listings, the diff, explanations."""
