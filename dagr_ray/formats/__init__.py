"""Files as other people write them: BEIR, TREC, Parquet and exports."""
