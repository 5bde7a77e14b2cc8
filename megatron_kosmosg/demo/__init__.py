"""`kosmosg demo`: what the page does (studio.py, requests.py, batch.py), and demo_page.py."""
