"""How pages travel from a worker to whoever reads them."""
