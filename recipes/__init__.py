"""Recipes that ship with the package, as YAML files; `optimum-barber run NAME` finds them here."""
