"""Programs for people, who say which answers they prefer."""
