"""After pretraining: judging data by models and rules, choosing of it, and making more."""
