"""Programs that the product is measured against; they use nothing of carft_ray."""
