"""Measures of frozen features: by neighbours, by linear heads, dense and by retrieval.

features        images to arrays of features; the baselines
knn             weighted votes of the nearest neighbours
linear          a grid of linear classifiers trained in one pass
logistic        logistic regression with its strength chosen on held-out examples
retrieval       average precision of a ranking
dense_data      images with a map of labels or of depth
segmentation    linear heads on patches, intersection over union
depth           bins of depth on patches, root mean square error
diagnostics     spread of features, a probe of single patches
"""
