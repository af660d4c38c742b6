"""What `dino.reproduce` measures: trained runs that share one bench, and what they show."""
