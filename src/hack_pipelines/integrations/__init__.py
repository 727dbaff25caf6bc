"""Caches for models of other libraries. Importing the package imports none of them."""
