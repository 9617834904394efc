"""Methods that train a student against a teacher."""
