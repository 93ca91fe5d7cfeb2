"""Methods that learn from few labelled and many unlabelled images, one file each."""
