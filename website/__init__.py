"""What the documentation site has besides docs/: pages made from code, files of the repository, diagrams."""
