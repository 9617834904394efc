"""Measurements of compressed language models: efficiency, quality, RAG; gated against stored baselines."""
