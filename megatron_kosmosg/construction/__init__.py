"""Images alone -> captions, entities, masks -> compositional records (the paper's Figure 4)."""
