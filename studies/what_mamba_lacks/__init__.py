"""What does Mamba lack to retrieve as a Transformer does? Four ingredients, with and without the rest."""
