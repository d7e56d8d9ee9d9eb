"""A generator of digits and a discriminator that learns to tell them from real ones, as GANs are commonly written."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--n_epochs", type=int, default=2, help="number of epochs of training")
parser.add_argument("--batch_size", type=int, default=24, help="size of the batches")
parser.add_argument("--lr", type=float, default=0.0002, help="adam: learning rate")
parser.add_argument("--b1", type=float, default=0.5, help="adam: decay of first order momentum of gradient")
parser.add_argument("--b2", type=float, default=0.999, help="adam: decay of second order momentum of gradient")
parser.add_argument("--latent_dim", type=int, default=16, help="dimensionality of the latent space")
parser.add_argument("--sample_interval", type=int, default=20, help="batches between lines")
parser.add_argument("--output", default="", help="where the generator goes in the end")


class Generator(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()

        def block(in_feat, out_feat, normalize=True):
            layers = [nn.Linear(in_feat, out_feat)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_feat, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, 64, normalize=False), *block(64, 128), nn.Linear(128, 64), nn.Tanh()
        )

    def forward(self, z):
        return self.model(z).view(z.size(0), 1, 8, 8)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2, inplace=True), nn.Dropout(0.1),
            nn.Linear(128, 64), nn.LeakyReLU(0.2, inplace=True), nn.Linear(64, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, img):
        return self.model(img.flatten(1))


def main():
    opt = parser.parse_args()
    print(opt)
    torch.manual_seed(0)

    adversarial_loss = torch.nn.BCELoss()
    generator, discriminator = Generator(opt.latent_dim), Discriminator()

    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    dataloader = DataLoader(TensorDataset(images), batch_size=opt.batch_size, shuffle=True)

    optimizer_G = torch.optim.Adam(generator.parameters(), lr=opt.lr, betas=(opt.b1, opt.b2))
    optimizer_D = torch.optim.Adam(discriminator.parameters(), lr=opt.lr, betas=(opt.b1, opt.b2))

    for epoch in range(opt.n_epochs):
        for i, (real_imgs,) in enumerate(dataloader):
            valid = torch.ones(real_imgs.size(0), 1)
            fake = torch.zeros(real_imgs.size(0), 1)

            # Train the generator: noise that becomes images which the discriminator takes for real
            optimizer_G.zero_grad()
            z = torch.randn(real_imgs.size(0), opt.latent_dim)
            gen_imgs = generator(z)
            g_loss = adversarial_loss(discriminator(gen_imgs), valid)
            g_loss.backward()
            optimizer_G.step()

            # Train the discriminator: tell real from generated samples
            optimizer_D.zero_grad()
            real_loss = adversarial_loss(discriminator(real_imgs), valid)
            fake_loss = adversarial_loss(discriminator(gen_imgs.detach()), fake)
            d_loss = (real_loss + fake_loss) / 2
            d_loss.backward()
            optimizer_D.step()

            if i % opt.sample_interval == 0:
                print(f"[Epoch {epoch}/{opt.n_epochs}] [Batch {i}/{len(dataloader)}]", end=" ")
                print(f"[D loss: {d_loss.item():f}] [G loss: {g_loss.item():f}]")

    if opt.output:
        torch.save(generator.state_dict(), opt.output)


if __name__ == "__main__":
    main()
