"""What all verbs share: a job from its plan to the published folder, and its report."""
