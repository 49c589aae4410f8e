"""``moejax launch``: several processes of one machine, and a watch over them."""
