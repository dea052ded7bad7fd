"""Networks that more than one part asks: samplers guide by them and train them, rewards score with them."""
