def insert(text):
  return text
