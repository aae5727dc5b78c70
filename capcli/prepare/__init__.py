"""`capcli prepare`: writes a compact copy of images and their captions, from which training reads at full speed."""
