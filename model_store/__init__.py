"""What a model is and how it is kept: LuCA, statistics, selection, the bank, files and the store."""
