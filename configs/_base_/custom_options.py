# Options of the configs for your own data; a None is chosen from the data and the machine, and printed.
data_root = None  # the folder of the data
val_fraction = None  # share of the images to split off, of data without a validation split
arch = '1m'  # 1m, 2m, 5m, 20m or 50m
image_size = None  # pixels: one number, or height,width
pretrained = 'imagenet'  # published ImageNet weights; or a file, an address, or none
max_epochs = None
batch_size = None  # of each GPU
lr = None
tensorboard = False  # log for TensorBoard, too
