"""Recipes: plain assignments to the settings of a script. support/settings.py reads them."""
