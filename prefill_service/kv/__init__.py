"""The KV hand-off: manifest, pages, page server, and the connector inside vLLM."""
