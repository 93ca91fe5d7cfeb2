"""Kinds of networks by the names their papers gave them, each with its smallest member; and those that are left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import timm

from selfsight.backbones.registry import choices
from selfsight.errors import USAGE, UserError, nearest


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        title: as the literature calls it.
        smallest: name of the member with the fewest parameters.
        patterns: of the members' names, as a shell reads them; those that begin with ``!`` are none.
    """

    title: str
    smallest: str
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return self.title

    def members(self) -> list[str]:
        """Names of all members, sorted."""
        names = [*timm.list_models(), *choices()]
        chosen = [one for one in self.patterns if not one.startswith("!")]
        refused = [one[1:] for one in self.patterns if one.startswith("!")]
        return sorted(
            {
                name
                for name in names
                if any(fnmatch.fnmatchcase(name, one) for one in chosen)
                and not any(fnmatch.fnmatchcase(name, one) for one in refused)
                and not name.startswith("test_")
            }
        )


def _families(text: str) -> tuple[Family, ...]:
    rows = ([part.strip() for part in line.split("|")] for line in text.strip().splitlines())
    return tuple(Family(title, smallest, tuple(patterns.split())) for title, smallest, patterns in rows)


FAMILIES = _families(
    """
    ResNet             | resnet10_slim              | resnet[12356]* wide_resnet*
    ResNeXt            | resnext26ts                | resnext*
    ResNet-D           | resnetblur18               | resnetaa* resnetblur*
    ResNet-RS          | resnetrs50                 | resnetrs*
    ResNetV2           | resnetv2_18                | resnetv2_*
    SE-ResNet          | seresnext26ts              | seresne* legacy_se* senet*
    ECA-ResNet         | eca_resnext26ts            | ecaresn* eca_resne*
    GC-ResNet          | gcresnext26ts              | gcresn*
    SKNet              | skresnet18                 | skresn*
    ResNeSt            | resnest14d                 | resnest*
    Res2Net            | res2next50                 | res2ne*
    TResNet            | tresnet_m                  | tresnet*
    CSPNet             | cs3darknet_focus_s         | cs3* csp* darknet* sedarknet* !cspnext*
    CSPNeXt            | cspnext_tiny               | cspnext_*
    DenseNet           | densenet121                | densenet*
    DPN                | dpn48b                     | dpn*
    DLA                | dla46x_c                   | dla*
    HRNet              | hrnet_w18_small            | hrnet*
    VoVNet             | ese_vovnet19b_slim_dw      | *vovnet*
    SelecSLS           | selecsls42                 | selecsls*
    VGG                | vgg11                      | vgg*
    Inception          | inception_v3               | inception_v* inception_resnet*
    Xception           | legacy_xception            | *xception*
    NASNet             | nasnetalarge               | nasnet*
    PNASNet            | pnasnet5large              | pnasnet*
    RegNet             | regnetx_002                | regnetx_* regnety_* regnetv_*
    RegNetZ            | regnetz_005                | regnetz_*
    NFNet              | nf_regnet_b0               | *nfnet* nf_*
    RepVGG             | repvgg_a0                  | repvgg*
    MobileOne          | mobileone_s1               | mobileone*
    GENet              | gernet_s                   | gernet*
    EfficientNet       | efficientnet_lite0         | efficientnet_* tf_efficientnet_*
    EfficientNetV2     | tf_efficientnetv2_b0       | *efficientnetv2*
    MobileNetV1 and V2 | mobilenetv2_035            | mobilenetv1* mobilenetv2* mobilenet_edgetpu*
    MobileNetV3        | mobilenetv3_small_050      | mobilenetv3* tf_mobilenetv3*
    MobileNetV4        | mobilenetv4_conv_small_035 | mobilenetv4*
    MobileNetV5        | mobilenetv5_base           | mobilenetv5*
    MnasNet            | mnasnet_small              | mnasnet* semnasnet* spnasnet*
    MixNet             | mixnet_s                   | mixnet* tf_mixnet*
    FBNet              | fbnetc_100                 | fbnet*
    TinyNet            | tinynet_e                  | tinynet*
    LCNet              | lcnet_035                  | lcnet_*
    LCNetV2            | lcnetv2_small              | lcnetv2*
    HardCoRe-NAS       | hardcorenas_b              | hardcorenas*
    GhostNet           | ghostnet_050               | ghostnet_*
    GhostNetV2         | ghostnetv2_100             | ghostnetv2*
    GhostNetV3         | ghostnetv3_050             | ghostnetv3*
    RepGhostNet        | repghostnet_050            | repghostnet*
    ReXNet             | rexnet_100                 | rexnet*
    HGNet              | hgnetv2_b0                 | hgnet*
    FasterNet          | fasternet_t0               | fasternet*
    StarNet            | starnet_s050               | starnet*
    RDNet              | rdnet_tiny                 | rdnet*
    CSATv2             | csatv2                     | csatv2*
    ConvMixer          | convmixer_768_32           | convmixer*
    ConvNeXt           | convnext_zepto_rms         | convnext_*
    ConvNeXt V2        | convnextv2_atto            | convnextv2*
    InceptionNeXt      | inception_next_atto        | inception_next*
    MambaOut           | mambaout_femto             | mambaout*
    RepLKNet           | replknet_31b               | replknet*
    FocalNet           | focalnet_tiny_srf          | focalnet*
    MetaFormer         | poolformerv2_s12           | poolformer* convformer* caformer*
    RepViT             | repvit_m1                  | repvit*
    FastViT            | fastvit_t8                 | fastvit*
    EdgeNeXt           | edgenext_xx_small          | edgenext*
    MobileViT          | mobilevit_xxs              | mobilevit_*
    MobileViTV2        | mobilevitv2_050            | mobilevitv2*
    EfficientViT (MIT) | efficientvit_b0            | efficientvit_b* efficientvit_l*
    EfficientViT (MSRA) | efficientvit_m0            | efficientvit_m*
    EfficientViM       | efficientvim_m1            | efficientvim*
    EfficientFormer    | efficientformer_l1         | efficientformer_*
    EfficientFormerV2  | efficientformerv2_s0       | efficientformerv2*
    iFormer            | iformer_t                  | iformer*
    LowFormer          | lowformer_b0               | lowformer*
    CPUBone            | cpubone_nano               | cpubone*
    SHViT              | shvit_s1                   | shvit*
    SwiftFormer        | swiftformer_xs             | swiftformer*
    BoTNet             | eca_botnext26ts_256        | botnet* sebotnet* eca_botnext*
    HaloNet            | halonet_h1                 | halo* sehalonet* eca_halonext* lamhalo*
    LambdaNetworks     | lambda_resnet26t           | lambda_*
    BAT                | bat_resnext26ts            | bat_*
    CoAtNet            | coatnet_pico_rw_224        | coatnet* coatnext*
    MaxViT             | maxvit_pico_rw_256         | maxvit* maxxvit*
    NextViT            | nextvit_small              | nextvit*
    DaViT              | davit_tiny                 | davit*
    GC ViT             | gcvit_xxtiny               | gcvit*
    Visformer          | visformer_tiny             | visformer*
    LeViT              | levit_128s                 | levit*
    TinyViT            | tiny_vit_5m_224            | tiny_vit*
    CCT                | cct_2_3x2                  | cct_*
    CvT                | cvt_13                     | cvt_*
    CoaT               | coat_tiny                  | coat_*
    PiT                | pit_ti_224                 | pit_*
    PVTv2              | pvt_v2_b0                  | pvt_v2*
    Twins              | twins_svt_small            | twins*
    NesT               | nest_tiny                  | nest_*
    Swin               | swin_tiny_patch4_window7_224 | swin_*
    Swin V2            | swinv2_tiny_window16_256   | swinv2_* !swinv2_cr*
    Swin V2 (CR)       | swinv2_cr_tiny_224         | swinv2_cr*
    MViTv2             | mvitv2_tiny                | mvitv2*
    Hiera              | hiera_tiny_224             | hiera_*
    Hiera of SAM 2     | sam2_hiera_tiny            | sam2_hiera* hieradet*
    Sequencer          | sequencer2d_s              | sequencer2d*
    MLP-Mixer          | gmixer_12_224              | mixer_* gmixer*
    gMLP               | gmlp_ti16_224              | gmlp*
    ResMLP             | resmlp_12_224              | resmlp*
    ViT | vit_tiny_patch16_224 | vit_*_patch* flexivit* vit_*_mci_* !*relpos* !*dino* !*rope* !*clip*
    ViT hybrid         | vit_tiny_r_s16_p8_224      | vit_*_r??_* vit_*_r_* vit_*resnet* vitamin*
    ViT, relative positions | vit_srelpos_small_patch16_224 | vit_*relpos*
    ViT, rotary positions | vit_small_patch16_rope_224 | vit_*rope*
    ViT with CLIP      | vit_xsmall_patch16_clip_224 | vit_*clip*
    ViT of DINO, MAE, MoCo v3 | vit_tiny_dino              | vit_*_dino vit_*_mae vit_*_moco
    DINOv2's ViT       | vit_small_patch14_dinov2   | vit_*_dinov2
    DINOv3's ViT       | vit_tiny_patch16_dinov3_qkvb | vit_*_dinov3*
    ViT of SAM         | samvit_base_patch16_224    | samvit*
    NaFlexViT          | naflexvit_base_patch16_parfac_gap | naflexvit*
    DeiT               | deit_tiny_patch16_224      | deit*
    BEiT               | beit_base_patch16_224      | beit*
    EVA                | eva02_tiny_patch14_224     | eva*
    CaiT               | cait_xxs24_224             | cait*
    ConViT             | convit_tiny                | convit*
    CrossViT           | crossvit_tiny_240          | crossvit*
    TNT                | tnt_s_legacy_patch16_224   | tnt*
    VOLO               | volo_d1_224                | volo*
    XCiT               | xcit_nano_12_p8_224        | xcit*
    Qwen3's ViT        | qwen3_vit_88m              | qwen3_vit*
    Gemma 4's ViT      | gemma4_vit_167m            | gemma4_vit*
    DeepSeek's ViT     | deepseek_vit_412m          | deepseek_vit*
    AIMv2              | aimv2_large_patch14_224    | aimv2*
    ResNet of BYOL     | byol_resnet18              | byol_resnet*
    ResNet of SimCLR   | simclr_resnet18            | simclr_resnet*
    Wide ResNet        | wrn_28_2                   | wrn_*
    NIN                | nin3                       | nin*
    AlexNet            | alexnet_rotnet             | alexnet*
    """
)

#: networks of the literature that neither timm nor we have, and what is nearest
LEFT_OUT = {
    "EMO and EMOv2": "edgenext, mobilevitv2, repvit",
    "MOAT": "coatnet, maxvit: the same mobile convolutions and attention",
    "NASNet-A (Mobile)": "nasnetalarge; mnasnet for its size",
    "RevCol": "none; convnext has its blocks without the reversible columns",
    "T2T-ViT": "tnt, nest; cct for small images",
}


def named(words: Sequence[str]) -> list[Family]:
    """The families that are meant: by their titles, parts of them, or the name of a member.

    Raises:
        UserError: there is no such family; names the nearest.
    """
    found: list[Family] = []
    titles = {_plain(family.title): family for family in FAMILIES}
    for word in words:
        plain = _plain(str(word))
        chosen = [titles[plain]] if plain in titles else [f for title, f in titles.items() if plain in title]
        chosen = chosen or [family for family in FAMILIES if str(word) in family.members()]
        if not chosen:
            known = [family.title for family in FAMILIES]
            raise UserError(f"there is no family of networks '{word}'.{nearest(str(word), known)}", status=USAGE)
        found += [family for family in chosen if family not in found]
    return found or list(FAMILIES)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
