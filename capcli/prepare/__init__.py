"""`capcli prepare`: a compact copy of images and their captions, made once, which training reads at full speed."""
