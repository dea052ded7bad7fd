"""Reward adapters: media in, Scores out. One file per adapter, imported when it is used.

``BUILTIN`` maps the names a configuration may use to ``module:attribute [extra]``, the syntax of an entry point; the extra is
what ``pip install 'visalign[extra]'`` must provide. Third parties use the same syntax in the entry-point group
``visalign.rewards``.
"""

if __name__ != "visalign.rewards":
    raise ImportError("import visalign.rewards, not rewards: the second name would load every module twice")

BUILTIN: dict[str, str] = {
    "aesthetic": "visalign.rewards.aesthetic:AestheticScore",
    "bradley_terry": "visalign.rewards.pairwise:BradleyTerry",
    "by_user": "visalign.rewards.by_user:ByUser",
    "captions": "visalign.rewards.captions:CaptionVerifier",
    "clap": "visalign.rewards.clap:ClapScore [audio]",
    "clip": "visalign.rewards.clip:ClipScore",
    "cmmd": "visalign.rewards.kernel_distance:CMMD",
    "consistency": "visalign.rewards.consistency:SetConsistency",
    "consistency_judge": "visalign.rewards.judges.consistency:ConsistencyJudge",
    "exemplar_distance": "visalign.rewards.exemplar_distance:ExemplarDistance",
    "flow_smoothness": "visalign.rewards.flow_smoothness:FlowSmoothness",
    "framewise": "visalign.rewards.framewise:FrameWise",
    "frechet_distance": "visalign.rewards.distribution:FrechetDistance",
    "function": "visalign.rewards.function:FunctionReward",
    "hps": "visalign.rewards.hps:HumanPreferenceScore",
    "imagereward": "visalign.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "visalign.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "visalign.rewards.jpeg:JpegIncompressibility",
    "kad": "visalign.rewards.kernel_distance:KAD",
    "kid": "visalign.rewards.kernel_distance:KID",
    "latent_head": "visalign.rewards.latent_head:LatentHead",
    "loudness_gate": "visalign.rewards.loudness:LoudnessGate",
    "objects": "visalign.rewards.detector:DetectedObjects",
    "ocr": "visalign.rewards.ocr:WrittenText [ocr]",
    "pairwise_judge": "visalign.rewards.judges.pairwise:PairwiseJudge",
    "pickscore": "visalign.rewards.pickscore:PickScore",
    "pointwise_judge": "visalign.rewards.judges.pointwise:PointwiseJudge",
    "remote": "visalign.rewards.remote.rewards:Remote",
    "remote_judge": "visalign.rewards.remote.rewards:RemoteJudge",
    "reward_token": "visalign.rewards.judges.reward_token:RewardTokenScore",
    "rubric_judge": "visalign.rewards.judges.rubric:RubricJudge",
    "simulator_stability": "visalign.rewards.stability:SimulatorStability [sim3d]",
    "temporal_consistency": "visalign.rewards.temporal:TemporalConsistency",
    "testpoint_judge": "visalign.rewards.judges.testpoints:TestpointJudge",
    "trained": "visalign.rewards.trained:TrainedReward",
    "vendi": "visalign.rewards.distribution:VendiScore",
    "win_rate": "visalign.rewards.pairwise:WinRate",
}
