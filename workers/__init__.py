"""The engine. torch lives here; gradio, duckdb and ``app`` do not."""
