"""Progress, timeline, gallery, the doctor, and benchmark pages."""
