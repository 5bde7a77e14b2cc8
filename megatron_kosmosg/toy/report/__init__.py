"""The page that a quickstart leaves: one self-contained HTML file made from its output folder."""
