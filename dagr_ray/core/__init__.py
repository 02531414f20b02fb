"""The ground floor: configs, tables, folders, and how a stage's folder is built."""
