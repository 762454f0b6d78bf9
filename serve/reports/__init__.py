"""Report: progress, timeline, gallery, doctor, load tests and their page."""
