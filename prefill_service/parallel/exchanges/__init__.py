"""The exchanges: how queries of one rank meet the keys of all."""
