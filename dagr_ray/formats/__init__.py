"""Readers and writers of file formats: BEIR, TREC, Parquet and exports."""
