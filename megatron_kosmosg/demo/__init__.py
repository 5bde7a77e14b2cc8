"""`kosmosg demo`: what the page does (studio.py, requests.py, batch.py), and the page (page.py)."""
