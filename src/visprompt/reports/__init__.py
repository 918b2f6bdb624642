"""What runs came to: tables, tests, figures and a page, made of the folders of finished runs."""
