"""Images and labels: published data sets, folders, arrays, and scikit-learn's digits, which need no download."""
