"""Programs for people: choose between answers."""
