"""Data: documents, tokenizers, packed rows and resumable batches.

corpus    CorpusConfig, open_corpus         which documents
tokenizers                                  text to ids and back
token_store                                 a corpus tokenised once
packing, synthetic                          rows by number
pipeline  batches, evaluation_batches       rows to batches of this process
text      packed_rows, tokenizer_for        the first four in one call
image_corpus  ImageConfig, open_images      which images
images    open_image                        one image file as an array
image_transforms                            crops, colours, blur
assets    asset                             optional files of public packages
"""
