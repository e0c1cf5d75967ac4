"""Tables of others, remade: their data, models and measures, with the methods of whence on them."""
