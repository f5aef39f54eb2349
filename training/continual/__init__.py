"""The continual benchmark: tasks learnt one after another, by the product and by the published baselines."""
