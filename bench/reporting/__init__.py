"""What is made of records: pages, pictures, comparisons, goals and tables."""
