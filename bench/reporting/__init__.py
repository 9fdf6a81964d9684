"""Pages, pictures, comparisons, goals and tables that are made from records."""
