"""What each term brings, and where: methods under equal tuning over cells of data and students."""
